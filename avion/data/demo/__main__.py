"""Films the videos that the calling process asks for: pickled tasks come in, the clips filmed go out."""

import pickle
import sys

from avion.data.demo.dataset import film

if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps([film(task) for task in pickle.load(sys.stdin.buffer)]))
