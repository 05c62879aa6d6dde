"""Media to tensors and back: pictures in, labels out."""
