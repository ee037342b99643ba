"""The roof: whole ways made of the verbs. Imports everything below; nothing below imports it."""
