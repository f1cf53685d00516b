"""`report`: the pictures of a cache or a run as one HTML file, drawn here without any library."""
