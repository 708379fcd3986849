use super::*;
use serde_json::json;

fn read(row: Value) -> Record {
    Record::from_json(&row).unwrap()
}

fn refusal(row: Value) -> String {
    Record::from_json(&row).unwrap_err()
}

fn roles(record: Record) -> Vec<(String, String, bool)> {
    let Record::Chat(conversation) = record else { panic!("{record:?}") };
    conversation.messages.into_iter().map(|m| (m.role, m.content, m.trained)).collect()
}

fn turn(role: &str, content: &str, trained: bool) -> (String, String, bool) {
    (role.into(), content.into(), trained)
}

#[test]
fn conversations_train_the_assistant() {
    let expected = [turn("system", "s", false), turn("user", "q", false), turn("assistant", "a", true)];
    let messages = json!([
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    assert_eq!(roles(read(json!({"messages": messages, "id": 7}))), expected);
    assert_eq!(roles(read(json!({"conversations": messages}))), expected);
    let sharegpt = json!([
        {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    assert_eq!(roles(read(json!({"conversations": sharegpt}))), expected);
    let (prompt, completion) = (&messages.as_array().unwrap()[..2], &messages.as_array().unwrap()[2..]);
    assert_eq!(roles(read(json!({"prompt": prompt, "completion": completion}))), expected);
}

#[test]
fn single_messages_can_be_left_out() {
    let row = json!({"messages": [
        {"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1},
        {"role": "assistant", "content": "c", "train": false}, {"role": "user", "content": "d", "train": true}]});
    let trained: Vec<_> = roles(read(row)).into_iter().map(|turn| turn.2).collect();
    assert_eq!(trained, [false, true, false, false]);
    // The assistant's messages in the prompt are not trained.
    let row = json!({"prompt": [{"role": "assistant", "content": "a"}],
                     "completion": [{"role": "assistant", "content": "b"}]});
    assert_eq!(roles(read(row)), [turn("assistant", "a", false), turn("assistant", "b", true)]);
}

#[test]
fn what_the_template_needs_is_kept() {
    let row = json!({"tools": [{"name": "f"}], "messages": [
        {"role": "assistant", "tool_calls": [{"name": "f"}], "content": null, "weight": 1},
        {"role": "tool", "name": "f", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]});
    let Record::Chat(conversation) = read(row) else { unreachable!() };
    assert_eq!(conversation.tools, Some(json!([{"name": "f"}])));
    assert_eq!(Value::Object(conversation.messages[0].other.clone()), json!({"tool_calls": [{"name": "f"}]}));
    assert_eq!(conversation.messages[1].content, "12");
    assert_eq!(conversation.messages[1].other["name"], "f");
}

#[test]
fn texts_and_instructions() {
    assert_eq!(read(json!({"text": "t"})), Record::Text("t".into()));
    let completion = Record::Completion { prompt: "p".into(), completion: "c".into() };
    assert_eq!(read(json!({"prompt": "p", "completion": "c", "text": "ignored"})), completion);
    let plain = read(json!({"instruction": "do", "input": "", "output": "done"}));
    assert_eq!(plain.instruction_text().unwrap().0, "### Instruction:\ndo\n\n### Response:\n");
    assert_eq!(plain.instruction_chat().unwrap().messages[0].content, "do");
    let full = read(json!({"instruction": "do", "input": "it", "output": "done", "system": "be",
                           "history": [["a", "b"]]}));
    let chat = full.instruction_chat().unwrap().messages;
    let summary: Vec<_> = chat.iter().map(|m| (m.role.as_str(), m.content.as_str(), m.trained)).collect();
    assert_eq!(
        summary,
        [
            ("system", "be", false),
            ("user", "a", false),
            ("assistant", "b", false),
            ("user", "do\nit", false),
            ("assistant", "done", true)
        ]
    );
    let (prompt, answer) = full.instruction_text().unwrap();
    assert_eq!(answer, "done");
    assert_eq!(
        prompt,
        "be\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n"
    );
}

#[test]
fn refusals_name_the_key() {
    for (row, part) in [
        (json!([1]), "a row must be a JSON object, not a list"),
        (json!({}), "found none"),
        (json!({"question": 1, "answer": 2}), "found `question`, `answer`"),
        (json!({"messages": "hello"}), "`messages` must be a list of messages, not a string"),
        (json!({"messages": []}), "`messages` is empty"),
        (json!({"messages": ["x"]}), "`messages[0]` must be an object, not a string"),
        (json!({"messages": [{"role": "user"}]}), "`messages[0]`: `content` is missing"),
        (json!({"messages": [{"content": "x"}]}), "`messages[0]`: `role` is missing"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "`content` must be a string, not the number 5"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "type \"image\" is not supported"),
        (json!({"messages": [{"role": "assistant", "content": "", "weight": 0.5}]}), "`weight` must be 0 or 1"),
        (json!({"conversations": [{"from": "alien", "value": "x"}]}), "unknown `from` \"alien\""),
        (json!({"prompt": "p"}), "`prompt` without `completion`"),
        (json!({"completion": "p"}), "`completion` without `prompt`"),
        (json!({"prompt": "p", "completion": []}), "not a string and a list"),
        (json!({"prompt": "p", "chosen": "a", "rejected": "a"}), "are the same"),
        (json!({"instruction": "i"}), "`output` is missing"),
        (json!({"instruction": "i", "output": "o", "history": [["a"]]}), "`history` must be a list of"),
        (json!({"text": null}), "no known keys"),
        (json!({"text": 3}), "`text` must be a string"),
    ] {
        let message = refusal(row.clone());
        assert!(message.contains(part), "{row}: {message}");
    }
}
