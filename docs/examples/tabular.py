"""A table with a class and a number to predict, both with missing labels. Run: python docs/examples/tabular.py

No class is written: data=table reads the CSV, arch=mlp reads its columns.
"""

import csv
import random

import mtl


def write(file: str, rows: int = 400) -> None:
    """People with age and hours of work; a third has no income, a fifth no answer whether they are content."""
    draw = random.Random(0)
    with open(file, "w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["age", "hours", "income", "content"])
        for i in range(rows):
            age, hours = draw.randint(20, 65), draw.randint(10, 50)
            income = 900 + 20 * age + 60 * hours + draw.gauss(0, 100)
            content = "yes" if hours < 30 else "no"
            table.writerow([age, hours, f"{income:.2f}" if i % 3 else "", content if i % 5 else ""])


def main():
    write("people.csv")
    result = mtl.train(
        "data=table", "arch=mlp", "loss=pcgrad", "logger=none", seed=0, trainer={"epochs": 8}, optimizer={"lr": 0.05},
        data={"file": "people.csv", "labels": {"income": "number", "content": "class"}, "batch_size": 32},
    )  # fmt: skip
    run = mtl.load(result.directory)
    answers = run.predict([[30.0, 20.0], [60.0, 45.0]])  # age, hours
    content = run.tasks[1]
    print(answers["income"]["number"], [content.classes[i] for i in answers["content"]["class"]])
    return result, answers


if __name__ == "__main__":
    main()
