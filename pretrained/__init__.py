"""Works on a model that is trained already: Hugging Face folders, LoRA adapters, calibration, and the replacement of layers."""
