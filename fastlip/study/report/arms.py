"""Names and colours of the arms."""

ARM_NAMES = {
    "scratch": "scratch",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
    "softmax": "softmax regression",
    "mlp": "perceptron",
    "convnet": "ConvNet",
    "resnet18": "ResNet-18",
    "disjoint": "disjoint",
    "matched": "matched",
}

#: Colours that the colour-blind can tell apart on white and on black; the report replaces them in dark mode.
ARM_COLOURS = {
    "scratch": "#c2510a",
    "finetune": "#0a5cc2",
    "linear": "#8a3fb0",
    "partial": "#0b7d78",
    "lpft": "#b0216b",
    "softmax": "#5c7a12",
    "mlp": "#5c7a12",
    "convnet": "#5c7a12",
    "resnet18": "#5c7a12",
    "disjoint": "#5c7a12",
    "matched": "#5c7a12",
}
