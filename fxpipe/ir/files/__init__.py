"""Values from files that anybody may have written.

In: text. Out: frozen values, checked field by field. Never: anything in a file is executed, or taken on trust.
"""
