"""How many tokens does each admitted request get in this step?"""
