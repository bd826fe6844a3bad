"""AVION's old import paths. Each module hands on what lives elsewhere; nothing in this project imports them."""
