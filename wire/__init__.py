"""Every byte format and identity that two rooms share."""
