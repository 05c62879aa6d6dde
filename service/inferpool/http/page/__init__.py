"""The page at `/`, for people: one HTML file, put together from the files beside."""
