"""Where things are in the demo dataset."""

from dataclasses import dataclass
from pathlib import Path

STAMP = "demo.json"


@dataclass(frozen=True)
class DemoPaths:
    """Where things are under `root`. EPIC-KITCHENS-100's and EgoSchema's files have their original names."""

    root: Path

    # Ego4D

    @property
    def train_pickle(self) -> Path:
        """Ego4D narrations: a pickled list of (video_uid, start_sec, end_sec, narration)."""
        return self.root / "ego4d_train.pkl"

    @property
    def long_train_pickle(self) -> Path:
        """The same of the same videos, each narration about two actions in a row."""
        return self.root / "ego4d_train_long.pkl"

    @property
    def train_videos(self) -> Path:
        """{video_uid}.mp4/{start}.mp4"""
        return self.root / "videos_train"

    # EPIC-KITCHENS-100

    @property
    def ek100_videos(self) -> Path:
        """{participant}/{video}.MP4/{start}.MP4, of both splits; training's are those of `train_videos` once more."""
        return self.root / "videos_ek100"

    @property
    def val_videos(self) -> Path:
        """The same folder: evaluation videos are named {participant}_1xx."""
        return self.ek100_videos

    @property
    def annotations(self) -> Path:
        return self.root / "epic-kitchens-100-annotations"

    @property
    def train_csv(self) -> Path:
        return self._retrieval / "EPIC_100_retrieval_train.csv"

    @property
    def train_sentences(self) -> Path:
        return self._retrieval / "EPIC_100_retrieval_train_sentence.csv"

    @property
    def train_relevancy(self) -> Path:
        """A pickled matrix (clips × sentences), as is `relevancy`."""
        return self._retrieval / "relevancy" / "caption_relevancy_EPIC_100_retrieval_train.pkl"

    @property
    def val_csv(self) -> Path:
        return self._retrieval / "EPIC_100_retrieval_test.csv"

    @property
    def val_sentences(self) -> Path:
        return self._retrieval / "EPIC_100_retrieval_test_sentence.csv"

    @property
    def relevancy(self) -> Path:
        return self._retrieval / "relevancy" / "caption_relevancy_EPIC_100_retrieval_test.pkl"

    @property
    def action_train_csv(self) -> Path:
        """The clips of `train_csv`, under the name that action recognition knows them by."""
        return self.annotations / "EPIC_100_train.csv"

    @property
    def action_validation_csv(self) -> Path:
        """The clips of `val_csv` in the same form."""
        return self.annotations / "EPIC_100_validation.csv"

    validation_csv = action_validation_csv

    @property
    def verb_classes(self) -> Path:
        return self.annotations / "EPIC_100_verb_classes.csv"

    @property
    def noun_classes(self) -> Path:
        return self.annotations / "EPIC_100_noun_classes.csv"

    @property
    def tail_verbs(self) -> Path:
        """The rare verb classes: one column, `verb`."""
        return self.annotations / "EPIC_100_tail_verbs.csv"

    @property
    def tail_nouns(self) -> Path:
        """The rare noun classes: one column, `noun`."""
        return self.annotations / "EPIC_100_tail_nouns.csv"

    @property
    def unseen_participants(self) -> Path:
        """Who appears in no training video: one column, `participant_id`."""
        return self.annotations / "EPIC_100_unseen_participant_ids_validation.csv"

    @property
    def reversed_pairs(self) -> Path:
        """A list of {narration_id, text, partner_text}, one per evaluation clip."""
        return self.root / "reversed_pairs.json"

    # EgoSchema

    @property
    def egoschema_videos(self) -> Path:
        """{q_uid}.mp4, whole."""
        return self._egoschema / "videos"

    @property
    def egoschema_questions(self) -> Path:
        """A list of {q_uid, google_drive_id, question, "option 0" … "option 4"}."""
        return self._egoschema / "questions.json"

    @property
    def egoschema_answers(self) -> Path:
        """{q_uid: 0 … 4}, of all questions."""
        return self._egoschema / "subset_answers.json"

    @property
    def uid_to_ego4d(self) -> Path:
        """{q_uid: {video_uid, starting_sec, ending_sec}}"""
        return self._egoschema / "uid_to_ego4d.json"

    # Other zero-shot benchmarks; Charades-Ego has the videos of EgoSchema, EgoMCQ and the captions those of EK-100

    @property
    def egtea_clips(self) -> Path:
        """{recording}/{CLIP_ID}.mp4, trimmed."""
        return self.root / "egtea" / "cropped_clips"

    @property
    def egtea_split(self) -> Path:
        """A line `CLIP_ID ACTION VERB NOUN …` per clip."""
        return self.root / "egtea" / "test_split1.txt"

    @property
    def egtea_classes(self) -> Path:
        """A line `Name_of_action N` per class."""
        return self.root / "egtea" / "action_idx.txt"

    @property
    def charades_split(self) -> Path:
        """The videos, each with its actions and their times."""
        return self.root / "charades_ego" / "CharadesEgo_v1_test_only1st.csv"

    @property
    def charades_classes(self) -> Path:
        """A line `c000 Name of the class` per class."""
        return self.root / "charades_ego" / "Charades_v1_classes.txt"

    @property
    def egomcq(self) -> Path:
        """{"0": {answer, query, choices, types}, …}"""
        return self.root / "egomcq.json"

    @property
    def captions(self) -> Path:
        """video, start, end, caption: an evaluation clip of each sentence, with two captions."""
        return self.root / "captions.csv"

    @property
    def stamp(self) -> Path:
        return self.root / STAMP

    @property
    def _retrieval(self) -> Path:
        return self.annotations / "retrieval_annotations"

    @property
    def _egoschema(self) -> Path:
        return self.root / "egoschema"
