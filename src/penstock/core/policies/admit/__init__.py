"""May this request take KV memory now?"""
