"""Online concept compression: middle layers read only discrete concepts, deep layers read concepts and the latest
tokens.
"""
