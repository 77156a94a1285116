"""Who is considered first?"""
