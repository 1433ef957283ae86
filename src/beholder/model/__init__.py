"""The model: a frozen vision tower, a trained connector, a frozen language model, and what joins them.

``vision`` and ``language`` are the two doors to outside libraries; ``connector`` is plain torch; ``fusion`` and
``losses`` are pure functions; ``plan`` says what learns; ``placement`` resolves where adapters go, ``adapters`` is the
door to peft, ``adapted_linear`` the layer; ``build`` makes settings into parts and parts into ``vlm``, the whole.
Nothing here reads data files or knows the training loop.
"""
