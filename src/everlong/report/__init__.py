"""What a comparison found, for people: the verdict in words, a page that opens offline, a live table."""
