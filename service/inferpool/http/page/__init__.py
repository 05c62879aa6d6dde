"""The page at `/`, for people: one HTML file, put together from `page.html`, `page.css` and `page.js`."""
