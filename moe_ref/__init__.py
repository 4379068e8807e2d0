"""A NumPy-only reference for mixture-of-experts GGUF models: what is right, readable top to bottom.

Axis letters used in every shape comment of this package:

====  ==========================  ====  ==========================
T     tokens in this call         E     experts of a layer
D     model width                 k     experts used per token
H     query heads                 F     inner width of an expert
G     key/value heads             L     layers
K     width of a query/key head   B     quantized blocks of a row
V     width of a value head       S     positions in the KV cache
====  ==========================  ====  ==========================

Shapes are in NumPy order (slowest axis first), which is GGUF's ``ne`` reversed.
"""

__version__ = "0.1.0"
