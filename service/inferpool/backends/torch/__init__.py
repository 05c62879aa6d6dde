"""TorchScript files, exported programs and AOTInductor packages, run by PyTorch."""
