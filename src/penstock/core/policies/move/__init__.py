"""Which request changes its instance?"""
