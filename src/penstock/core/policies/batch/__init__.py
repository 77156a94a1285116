"""Which pooled requests run together?"""
