"""Which instance gets it?"""
