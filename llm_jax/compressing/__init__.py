"""An opened model made smaller by a method of `compress`: what it does with texts is looked at, the
method is applied, the result is measured beside its parent, and written.
"""
