"""Whether the files of a version are those that somebody has signed."""
