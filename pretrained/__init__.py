"""What acts on a trained model: Hugging Face folders, adapters, formats, calibration, replacement of layers."""
