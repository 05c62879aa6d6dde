"""The process that owns a device, the channel to it, and its supervisor."""
