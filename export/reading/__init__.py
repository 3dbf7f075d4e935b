"""One reader for each task: rows in, tokens to the graph, its outputs as answers; numpy and tokenizers alone.

What is here, and what of :mod:`lightning_ft.functional` it imports, is put together into ``predictor.py``, see
:mod:`lightning_ft.export.bundle`. So it imports at its top only the standard library and modules that are put in, too.
"""
