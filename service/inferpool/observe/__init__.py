"""What the server tells: metrics, logs and spans."""
