"""`ptv2`, command by command. Every command imports what it needs when it runs."""
