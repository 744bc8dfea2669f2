"""The commands: a parser and one call each. They may import anything, and nothing imports them."""
