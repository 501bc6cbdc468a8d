"""stub"""
def measure(database, corpus, data, read): return {}
