"""Which decoding requests advance in this step?"""
