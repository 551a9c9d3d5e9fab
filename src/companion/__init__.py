"""Companion: what makes a book of notebooks, whatever the paper."""
