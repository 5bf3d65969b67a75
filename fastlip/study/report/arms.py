"""What the arms of the study are called and how they are coloured."""

ARM_NAMES = {
    "scratch": "scratch",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
    "reference": "small reference, scratch",
}

#: Colours of the arms, told apart by the colour-blind and on white and black; the report swaps them in dark mode.
ARM_COLOURS = {
    "scratch": "#c2510a",
    "finetune": "#0a5cc2",
    "linear": "#8a3fb0",
    "partial": "#0b7d78",
    "lpft": "#b0216b",
    "reference": "#5c7a12",
}
