"""The rules that update weights by their gradient: what each keeps beside them, what it costs, and
the update itself."""
