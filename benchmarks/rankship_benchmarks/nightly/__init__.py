"""Every night, and the page over all of them."""
