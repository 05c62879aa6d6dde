"""Fuzzing of the modules in C; `scripts/fuzz` runs it under AddressSanitizer and UBSan."""
