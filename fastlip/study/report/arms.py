"""Names and colours of the arms."""

ARM_NAMES = {
    "scratch": "scratch",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
    "reference": "small reference, scratch",
}

#: Colours that the colour-blind can tell apart on white and on black; the report replaces them in dark mode.
ARM_COLOURS = {
    "scratch": "#c2510a",
    "finetune": "#0a5cc2",
    "linear": "#8a3fb0",
    "partial": "#0b7d78",
    "lpft": "#b0216b",
    "reference": "#5c7a12",
}
