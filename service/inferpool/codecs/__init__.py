"""Media to tensors and back: images, text and labels."""
