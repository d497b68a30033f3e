import traceback
from dipeo_llm import litellm_gate
def test_x():
    l = litellm_gate.import_litellm()
    try:
        print(l.get_llm_provider(model="mistral/mistral-large-latest"))
    except Exception:
        traceback.print_exc()
        raise
