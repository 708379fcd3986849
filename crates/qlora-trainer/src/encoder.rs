//! A model's tokenizer and chat template as the data code sees them.

use qlora_core::chat::{ChatTemplate, Message as ChatMessage, TemplateArguments};
use qlora_core::tokenizer::Tokenizer;
use serde_json::Value;

use crate::data::encode::EncodeError;
use crate::data::{Conversation, Encoded, TextEncoder};

/// A [`TextEncoder`] over a tokenizer and, for conversations, a chat template.
#[derive(Clone, Copy, Debug)]
pub struct ModelEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    ends: &'a [u32],
}

impl<'a> ModelEncoder<'a> {
    /// `ends` are the tokens at which the model's generation stops ([`qlora_core::end_tokens`]).
    pub fn new(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>, ends: &'a [u32]) -> Self {
        Self { tokenizer, template, ends }
    }

    /// The text that asks for the assistant's next message, as tokens.
    ///
    /// # Errors
    /// If there is no chat template, or it refuses the conversation.
    pub fn prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let text = self.template()?.render_prompt(&messages(conversation), &arguments(conversation))?;
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

    fn encode_chat(&self, conversation: &Conversation) -> Result<Encoded, EncodeError> {
        let messages = messages(conversation);
        let rendered = self.template()?.render_with_answers(&messages, &arguments(conversation))?;
        // One span an assistant's message, in order; of those, the ones that are trained.
        let flags = conversation.messages.iter().zip(&messages);
        if let Some((message, _)) = flags.clone().find(|(message, chat)| message.trained && !chat.is_assistant()) {
            return Err(format!("a message of role {:?} cannot be trained, only the assistant's", message.role).into());
        }
        let trained: Vec<bool> =
            flags.filter(|(_, chat)| chat.is_assistant()).map(|(message, _)| message.trained).collect();
        if trained.len() != rendered.answers.len() {
            return Err(format!(
                "the chat template marks {} answers in a conversation with {} assistant messages",
                rendered.answers.len(),
                trained.len()
            )
            .into());
        }
        let spans: Vec<_> =
            rendered.answers.into_iter().zip(trained).filter(|(_, t)| *t).map(|(span, _)| span).collect();
        let (ids, trained) = self.tokenizer.encode_with_spans(&rendered.text, &spans, false)?;
        Ok(Encoded { ids, trained })
    }

    fn bos(&self) -> Option<u32> {
        self.tokenizer.bos_token_id()
    }

    fn eos(&self) -> Option<u32> {
        self.tokenizer.eos_token_id().or_else(|| self.ends.first().copied())
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
