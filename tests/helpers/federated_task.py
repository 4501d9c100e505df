"""What is trained together in test_federated_deployment.py: a tiny LM from a folder, passages from a dictionary.

The test puts this file into a Flower app as its task.py, and runs the same file in a simulation.
"""

from __future__ import annotations

import time
from pathlib import Path

from ragkit.config import RAGConfig, RALTConfig
from ragkit.rag.corpus import RetrievedPassage
from ragkit.rag.generator import Generator
from ragkit.rag.system import RAGSystem
from ragkit.tuning.manager import TrainerManager
from ragkit.tuning.ralt import RALTTrainer

FOLDER = Path("@FOLDER@")  # the test fills it in
CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Norway": "Oslo", "Japan": "Tokyo", "Kenya": "Nairobi"}
ROWS = [
    {"id": f"q-{country}", "question": f"What is the capital of {country}?", "answer": capital}
    for country, capital in CAPITALS.items()
]
PARTS = [["q-Peru", "q-Ghana", "q-Norway"], ["q-Japan", "q-Kenya"]]


class Lookup:
    """Retrieves the one passage about the country in the question."""

    def retrieve(self, questions, top_k):
        found = []
        for question in questions:
            country = question.removesuffix("?").split()[-1]
            text = f"{CAPITALS[country]} is the capital of {country}."
            found.append([RetrievedPassage(id=country, text=text, score=1.0)])
        return found


def trainer(rows):
    generator = Generator.load(FOLDER / "generator", device="cpu")
    train = {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1}
    config = RALTConfig(output_dir=str(FOLDER / "runs"), top_k=1, lora_r=2, train=train)
    system = RAGSystem(Lookup(), generator, RAGConfig(prompt="plain", device="cpu"))
    return RALTTrainer(system, rows, config, eval_data=ROWS[:2])


def build(context):
    number = context.node_config.get("partition-id")
    if number == 1 and list((FOLDER / "runs").glob(f"federated-{context.run_id}/client-1/federated.json")):
        (FOLDER / "hanging").touch()
        time.sleep(600)  # in its second round, until the test kills it
    ids = PARTS[number] if number is not None else sum(PARTS, [])
    made = trainer([row for row in ROWS if row["id"] in ids])
    manager = TrainerManager("generator", generator_trainer=made)
    return manager.get_federated_task(local_epochs=1, client_evaluation=False)
