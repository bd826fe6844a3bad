"""What only a GPU can show; skipped, with the reason, where there is none. Needs neither videos nor decoders."""

from .stand_ins import stand_in_for_decoders

stand_in_for_decoders()  # before anything here imports the data's modules
