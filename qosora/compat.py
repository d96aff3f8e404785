"""Undocumented names of other packages: this file alone touches them."""
