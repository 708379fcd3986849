//! A model's tokenizer and chat template as the data code sees them.

use qlora_core::chat::{ChatTemplate, Message as ChatMessage, TemplateArguments};
use qlora_core::tokenizer::Tokenizer;
use serde_json::Value;

use crate::data::encode::{EncodeError, Notes};
use crate::data::{Conversation, Encoded, TextEncoder};

/// A [`TextEncoder`] over a tokenizer and, for conversations, a chat template.
#[derive(Clone, Copy, Debug)]
pub struct ModelEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    ends: &'a [u32],
}

impl<'a> ModelEncoder<'a> {
    /// `ends` are the tokens at which the model's generation stops.
    pub fn new(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>, ends: &'a [u32]) -> Self {
        Self { tokenizer, template, ends }
    }

    /// The text that asks for the assistant's next message, as tokens.
    ///
    /// # Errors
    /// If there is no chat template, or it refuses the conversation.
    pub fn prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let text = self.template()?.render(&messages(conversation), true, &arguments(conversation))?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn template(&self) -> Result<&ChatTemplate, EncodeError> {
        self.template.ok_or_else(|| {
            "the model has no chat template: give one with chat_template_path, or use prompt/completion rows".into()
        })
    }
}

impl TextEncoder for ModelEncoder<'_> {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        Ok(self.tokenizer.encode(text, add_special)?)
    }

    fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    fn encode_chat(&self, conversation: &Conversation, notes: &mut Notes) -> Result<Encoded, EncodeError> {
        let messages = messages(conversation);
        let is_trained = |i: usize| conversation.messages.get(i).is_some_and(|message| message.trained);
        if let Some(i) = (0..messages.len()).find(|&i| is_trained(i) && !messages[i].is_assistant()) {
            return Err(
                format!("a message of role {:?} cannot be trained, only the assistant's", messages[i].role).into()
            );
        }
        let rendered = self.template()?.render_with_answers(&messages, &arguments(conversation))?;
        notes.answers_not_found += rendered.not_found.iter().filter(|&&message| is_trained(message)).count();
        let answers = rendered.answers.into_iter().filter(|answer| is_trained(answer.message));
        let spans: Vec<_> = answers.map(|answer| answer.span).collect();
        let (ids, trained) = self.tokenizer.encode_with_spans(&rendered.text, &spans, false)?;
        Ok(Encoded { ids, trained })
    }

    fn encode_whole_chat(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let text = self.template()?.render(&messages(conversation), false, &arguments(conversation))?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn bos(&self) -> Option<u32> {
        self.tokenizer.bos_token_id()
    }

    fn eos(&self) -> Option<u32> {
        self.tokenizer.eos_token_id()
    }

    fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token) || self.eos() == Some(token)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError> {
        Ok(self.tokenizer.decode(tokens, false)?)
    }
}

fn messages(conversation: &Conversation) -> Vec<ChatMessage> {
    let convert = |message: &crate::data::Message| ChatMessage {
        role: message.role.clone(),
        content: Value::String(message.content.clone()),
        extra: message.other.clone(),
    };
    conversation.messages.iter().map(convert).collect()
}

fn arguments(conversation: &Conversation) -> TemplateArguments {
    conversation.tools.iter().map(|tools| ("tools".to_owned(), tools.clone())).collect()
}
