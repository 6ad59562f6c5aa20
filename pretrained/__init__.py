"""Works on trained models: Hugging Face models, LoRA adapters, calibration, and the replacement of layers."""
