"""Our own small grammar of spoken banking requests, for the fourteen intents that MInDS-14 has.

A pattern holds `{slot}`s; a slot's choices may hold slots again. All intents share their words, so that a sentence
that was never heard is still made of known words. MInDS-14: https://arxiv.org/abs/2104.08524 (names of the intents
only; no sentence is taken from it).
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache

_SLOT = re.compile(r"\{(\w+)\}")

SLOTS: dict[str, tuple[str, ...]] = {
    # how a request begins: followed by an infinitive, by an order, by nothing
    "want": ("i want to", "i need to", "i would like to", "can i", "how do i", "help me to", "is it possible to"),
    "ask": ("please", "can you", "could you please", "i want you to", "i need you to", "would you"),
    "hello": ("", "", "", "hello", "good morning", "excuse me", "sorry"),
    # when
    "past": ("", "yesterday", "this morning", "last week", "last month", "on monday", "two days ago"),
    "now": ("", "now", "today", "right now", "this week", "tonight"),
    "soon": ("", "today", "tomorrow", "on friday", "next week", "next month", "before monday"),
    # things
    "card": ("card", "debit card", "credit card", "business card", "new card", "bank card"),
    "account": ("account", "current account", "savings account", "joint account", "business account"),
    "bill": ("gas bill", "water bill", "phone bill", "electricity bill", "rent", "credit card bill", "insurance"),
    "place": ("supermarket", "petrol station", "restaurant", "hotel", "train station", "airport", "book shop"),
    "machine": ("cash machine", "ticket machine", "card machine"),
    "business": ("shop", "restaurant", "farm", "small company", "bakery", "garage"),
    "thing": ("house", "car", "boat", "flat", "farm", "kitchen"),
    # people and places
    "relative": ("wife", "husband", "son", "daughter", "mother", "father", "partner", "brother", "sister"),
    "payee": ("my {relative}", "my landlord", "the garage", "my lawyer", "the school", "the builder"),
    "country": ("france", "spain", "italy", "germany", "canada", "japan", "india", "america", "australia"),
    "city": ("london", "paris", "boston", "chicago"),
    "town": ("dublin", "glasgow", "york", "madrid"),
    "anywhere": ("{city}", "{town}"),
    "street": ("station", "church", "market", "park", "mill", "king", "river", "garden"),
    # numbers
    "digit": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "tens": ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
    "currency": ("pounds", "dollars", "euros"),
    "amount": ("{tens} {currency}", "{digit} hundred {currency}", "{tens} {digit} {currency}"),
    "fortune": ("{digit} thousand {currency}", "{tens} thousand {currency}", "{digit} hundred thousand {currency}"),
    "day": ("first", "third", "fifth", "tenth", "last day"),
    # what happens
    "app_action": (
        "log in", "pay a bill", "send money", "open my {account}", "check my balance", "freeze my {card}",
        "change my address", "look at my payments",
    ),
    "app_fault": ("shows an error", "stops", "closes", "is very slow", "does not work", "asks for my password again"),
    "loss": ("i lost it", "it was stolen", "someone else used it", "i can not find it", "i left it in a {place}"),
}  # fmt: skip

PATTERNS: dict[str, tuple[str, ...]] = {
    "abroad": (
        "{want} use my {card} in {country} {soon}",
        "will my {card} work in {country} {soon}",
        "i am going to {country} {soon} with my {card}",
        "is there a fee when i use my {card} in {country}",
        "{ask} tell me what it costs to pay by card in {country}",
    ),
    "address": (
        "{hello} {want} change my address {soon}",
        "i moved from {city} to {town} {past}",
        "{ask} change the address of my {account} to {anywhere}",
        "{ask} send my {card} to my new address in {anywhere}",
        "my new address is {tens} {digit} {street} street in {city}",
    ),
    "app_error": (
        "the app {app_fault} when i {app_action}",
        "i can not {app_action} in the app {now}",
        "{hello} the app on my phone {app_fault} {now}",
        "why is there an error in the app when i {app_action}",
    ),
    "atm_limit": (
        "what is the limit of my {card} at the {machine}",
        "{ask} change my cash limit to {amount} {now}",
        "how much cash can i get from my {account} {now}",
        "{want} get more than {amount} at the cash machine {soon}",
        "{want} change the cash limit of my {card} {soon}",
    ),
    "balance": (
        "{hello} what is the balance of my {account} {now}",
        "how much money is in my {account} {now}",
        "{ask} tell me the balance of my {account}",
        "do i have more than {amount} in my {account} {now}",
        "{want} check the balance of my {account} {now}",
    ),
    "business_loan": (
        "{want} get a business loan of {fortune}",
        "my {business} needs a loan of {fortune} {soon}",
        "what does a business loan of {fortune} cost",
        "how long does it take to get a loan for a {business}",
        "{ask} send me the papers for a loan for my {business}",
    ),
    "card_issues": (
        "{hello} my {card} did not work at the {place} {past}",
        "the {machine} at the {place} took my {card} {past}",
        "my {card} is broken and i need a new one {soon}",
        "why did the {place} not take my {card} {past}",
        "{ask} send me a new {card} {soon}",
    ),
    "cash_deposit": (
        "{want} pay {amount} in cash into my {account} {soon}",
        "where can i pay cash into my {account} {now}",
        "i paid {amount} in cash into my {account} {past}",
        "why is the cash from {anywhere} not in my {account}",
        "{ask} tell me how long a cash payment of {amount} takes",
    ),
    "direct_debit": (
        "{ask} stop the direct debit for my {bill} {now}",
        "{want} start a direct debit for my {bill} {soon}",
        "why was the direct debit for my {bill} paid twice {past}",
        "when is the direct debit for my {bill} paid",
        "{ask} move the direct debit for my {bill} to the {day} of the month",
    ),
    "freeze": (
        "{ask} freeze my {card} {now}",
        "{hello} {want} freeze my {account} {now}",
        "{ask} freeze my {card} because {loss}",
        "my {card} is gone and {loss} {past}",
        "someone else used my {card} at the {place} {past}",
    ),
    "high_value_payment": (
        "{want} send {fortune} to {payee} {soon}",
        "{ask} send {fortune} from my {account} to {payee}",
        "what is the limit for a payment from my {account}",
        "i am buying a {thing} and need to pay {fortune} {soon}",
        "how long does a payment of {fortune} to {country} take",
    ),
    "joint_account": (
        "{want} open a joint account with my {relative} {soon}",
        "{ask} open a {account} for my {relative} and me",
        "can my {relative} use the joint account in {country}",
        "{want} close the joint account with my {relative} {soon}",
        "who can get money from the account with my {relative}",
    ),
    "latest_transactions": (
        "{ask} show me the last {digit} payments from my {account}",
        "how much did i pay at the {place} {past}",
        "i did not make a payment of {amount} at the {place} {past}",
        "what were the last {digit} payments with my {card}",
        "{want} look at the payments from my {account} {past}",
    ),
    "pay_bill": (
        "{hello} {want} pay my {bill} {soon}",
        "{ask} pay {amount} for my {bill} {soon}",
        "when do i have to pay my {bill}",
        "did i pay my {bill} {past}",
        "{ask} pay my {bill} of {amount} from my {account}",
    ),
}


def sentences(intent: str, seed: str) -> Iterator[str]:
    """An endless, fixed series of sentences of one intent; they repeat in time.

    Args:
        intent: a key of `PATTERNS`.
        seed: another one gives another series.
    """
    number = 0
    while True:
        yield _expand(PATTERNS[intent], f"{seed}/{intent}/{number}")
        number += 1


@cache
def all_words() -> frozenset[str]:
    """Every word that the grammar can say."""
    texts = [text for texts in (*SLOTS.values(), *PATTERNS.values()) for text in texts]
    return frozenset(word for text in texts for word in _SLOT.sub(" ", text).split())


def digest(text: str) -> int:
    """A number in [0, 2**64) that depends on the text alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _expand(choices: tuple[str, ...], key: str) -> str:
    """One of the choices, its slots filled, each by a hash of its place in the sentence."""
    text = choices[digest(key) % len(choices)]
    for place, slot in enumerate(_SLOT.findall(text)):
        text = text.replace(f"{{{slot}}}", _expand(SLOTS[slot], f"{key}/{place}"), 1)
    return " ".join(text.split())
