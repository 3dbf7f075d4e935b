"""An exported folder behind HTTP, in a container, on AWS Lambda and as a Hugging Face endpoint.

``server`` needs the extra ``serve``; everything else here needs the standard library alone until a model is loaded.
The modules are also written into an exported folder (:func:`lightning_ft.export.serving.deploy.write_deployment`),
where they run beside ``predictor.py`` without this package: they import nothing of it but one another and the
predictor.
"""
