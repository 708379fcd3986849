//! Prompts of templates that ignore `add_generation_prompt`.

use super::{ChatTemplate, Message, TemplateArguments};
use crate::error::Result;

/// An answer that no template changes and none writes itself.
const ANSWER: &str = "qloraheaderprobe";

impl ChatTemplate {
    /// Renders a conversation up to where the assistant's next answer begins: [`ChatTemplate::render`] with
    /// `add_generation_prompt`, which is what transformers asks a model with.
    ///
    /// Templates that ignore that argument would ask without the header that every answer was trained behind. The header is
    /// then what the template writes before an answer that follows, and a warning says so. Where that is white space only
    /// (Llama 2, Mistral) the template needs no header, and nothing is added.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_prompt(&self, messages: &[Message], arguments: &TemplateArguments) -> Result<String> {
        let text = self.render(messages, true, arguments)?;
        if messages.last().is_none_or(Message::is_assistant) || text != self.render(messages, false, arguments)? {
            return Ok(text);
        }
        match self.header(messages, &text, arguments) {
            Some(header) if header.trim().is_empty() => Ok(text),
            Some(header) => {
                once(&format!(
                    "the chat template ignores add_generation_prompt; {header:?}, which it writes before an answer, is added"
                ));
                Ok(text + &header)
            }
            None => {
                once(
                    "the chat template ignores add_generation_prompt, and what it writes before an answer cannot be found: the \
                     model is asked without it. Give a template that has a generation prompt",
                );
                Ok(text)
            }
        }
    }

    /// The text between the rendered conversation and an answer that follows it: the header of the assistant's turn.
    fn header(&self, messages: &[Message], text: &str, arguments: &TemplateArguments) -> Option<String> {
        let answered = [messages, &[Message::assistant(ANSWER)]].concat();
        let answered = self.render(&answered, false, arguments).ok()?;
        let (header, _) = answered.strip_prefix(text)?.split_once(ANSWER)?;
        Some(header.to_owned())
    }
}

/// Says it once in a process, not for every prompt.
fn once(message: &str) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| tracing::warn!("{message}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(source: &str) -> String {
        let messages = [Message::system("S"), Message::user("U")];
        ChatTemplate::new(source, []).unwrap().render_prompt(&messages, &TemplateArguments::new()).unwrap()
    }

    #[test]
    fn the_header_is_found_where_the_template_has_no_generation_prompt() {
        let plain = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}";
        assert_eq!(prompt(plain), "<|system|>S<|end|>\n<|user|>U<|end|>\n<|assistant|>");
        // One that has it is asked with it alone.
        let with = format!("{plain}{{% if add_generation_prompt %}}<|assistant|><think>{{% endif %}}");
        assert_eq!(prompt(&with), "<|system|>S<|end|>\n<|user|>U<|end|>\n<|assistant|><think>");
        // One that always writes the header before what follows.
        let always = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% elif m.role == 'assistant' %} \
                      {{ m.content }}\n{% endif %}{% endfor %}";
        assert_eq!(prompt(always), "Q: U\nA:");
        // One that changes what is before an answer: as the template says.
        let rewrites = "{{ messages|length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
        assert_eq!(prompt(rewrites), "2[system]S[user]U");
    }
}
