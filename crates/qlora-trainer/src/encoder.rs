//! A model's tokenizer and chat template as the data code sees them.

use qlora_core::chat::{ChatTemplate, Message as ChatMessage, TemplateArguments};
use qlora_core::tokenizer::Tokenizer;
use serde_json::{Map, Value};

use crate::data::encode::{EncodeError, Notes};
use crate::data::{Conversation, Encoded, TextEncoder};
use crate::fingerprint::Fingerprint;

/// The text side of a model: tokenizer, chat template with its arguments, and the tokens that end an answer.
#[derive(Debug)]
pub struct ModelText {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) ends: Vec<u32>,
    pub(crate) template_kwargs: Map<String, Value>,
}

impl ModelText {
    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Turns rows into tokens the way training sees them.
    pub fn encoder(&self) -> ModelEncoder<'_> {
        ModelEncoder::new(&self.tokenizer, self.chat_template.as_ref(), &self.ends)
            .with_template_kwargs(&self.template_kwargs)
    }
}

/// A [`TextEncoder`] over a tokenizer and, for conversations, a chat template.
#[derive(Clone, Copy, Debug)]
pub struct ModelEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    ends: &'a [u32],
    template_kwargs: Option<&'a Map<String, Value>>,
}

impl<'a> ModelEncoder<'a> {
    /// `ends` are the tokens at which the model's generation stops ([`qlora_core::end_tokens`]).
    pub fn new(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>, ends: &'a [u32]) -> Self {
        Self { tokenizer, template, ends, template_kwargs: None }
    }

    /// Further arguments of the chat template, such as `enable_thinking`; those of a conversation come before them.
    #[must_use]
    pub fn with_template_kwargs(self, template_kwargs: &'a Map<String, Value>) -> Self {
        Self { template_kwargs: Some(template_kwargs), ..self }
    }

    /// The text that asks for the assistant's next message, as tokens.
    ///
    /// # Errors
    /// If there is no chat template, or it refuses the conversation.
    pub fn prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let (template, arguments) = (self.template()?, self.arguments(conversation));
        let text = template.render_prompt(&messages(conversation, template, &arguments)?, &arguments)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// The tokens that end an answer.
    pub(crate) fn ends(&self) -> &'a [u32] {
        self.ends
    }

    fn arguments(&self, conversation: &Conversation) -> TemplateArguments {
        let mut arguments = self.template_kwargs.cloned().unwrap_or_default();
        arguments.extend(conversation.template_kwargs.clone());
        arguments.extend(conversation.tools.iter().map(|tools| ("tools".to_owned(), tools.clone())));
        arguments
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
        let (template, arguments) = (self.template()?, self.arguments(conversation));
        let messages = messages(conversation, template, &arguments)?;
        let is_trained = |i: usize| conversation.messages.get(i).is_some_and(|message| message.trained);
        if let Some(i) = (0..messages.len()).find(|&i| is_trained(i) && !messages[i].is_assistant()) {
            return Err(
                format!("a message of role {:?} cannot be trained, only the assistant's", messages[i].role).into()
            );
        }
        let rendered = template.render_with_answers(&messages, &arguments)?;
        notes.answers_not_found += rendered.not_found.iter().filter(|&&message| is_trained(message)).count();
        let answers = rendered.answers.into_iter().filter(|answer| is_trained(answer.message));
        let spans: Vec<_> = answers.map(|answer| answer.span).collect();
        let (ids, trained) = self.tokenizer.encode_with_spans(&rendered.text, &spans, false)?;
        Ok(Encoded { ids, trained })
    }

    fn encode_whole_chat(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let (template, arguments) = (self.template()?, self.arguments(conversation));
        let text = template.render(&messages(conversation, template, &arguments)?, false, &arguments)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn encode_prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        self.prompt(conversation)
    }

    fn unused(&self, conversation: &Conversation) -> Vec<String> {
        let Some(template) = self.template else { return Vec::new() };
        let mut arguments = self.arguments(conversation);
        let capabilities = template.capabilities(&arguments);
        let mut unused = Vec::new();
        if conversation.tools.as_ref().and_then(Value::as_array).is_some_and(|tools| !tools.is_empty())
            && !capabilities.tools
        {
            unused.push("tools".to_owned());
        }
        if conversation.messages.iter().any(|message| message.other.contains_key("tool_calls"))
            && !capabilities.tool_calls
        {
            unused.push("tool_calls of messages".to_owned());
        }
        let tools = arguments.shift_remove("tools");
        let names: Vec<String> = arguments.keys().cloned().collect();
        arguments.extend(tools.map(|tools| ("tools".to_owned(), tools)));
        let unread = names.into_iter().filter(|name| !template.reads(name, &arguments));
        unused.extend(unread.map(|name| format!("chat_template_kwargs.{name}")));
        unused
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        let mut fingerprint = Fingerprint::new();
        fingerprint.bytes(self.tokenizer.identity()?.as_bytes());
        match self.template {
            None => fingerprint.word(0),
            // Its tokens are those of one time only.
            Some(template) if template.reads_clock() => return None,
            Some(template) => fingerprint.word(1).bytes(template.identity().as_bytes()),
        };
        for &end in self.ends {
            fingerprint.word(u64::from(end));
        }
        let kwargs = self.template_kwargs.cloned().unwrap_or_default();
        fingerprint.bytes(Value::Object(kwargs).to_string().as_bytes());
        Some(fingerprint)
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

/// A [`ModelEncoder`] that owns its tokenizer and template, for data that another thread reads.
#[derive(Clone, Debug)]
pub struct OwnedEncoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    ends: Vec<u32>,
    template_kwargs: Map<String, Value>,
}

impl OwnedEncoder {
    fn borrowed(&self) -> ModelEncoder<'_> {
        ModelEncoder::new(&self.tokenizer, self.template.as_ref(), &self.ends)
            .with_template_kwargs(&self.template_kwargs)
    }
}

impl From<ModelEncoder<'_>> for OwnedEncoder {
    fn from(encoder: ModelEncoder<'_>) -> Self {
        Self {
            tokenizer: encoder.tokenizer.clone(),
            template: encoder.template.cloned(),
            ends: encoder.ends.to_vec(),
            template_kwargs: encoder.template_kwargs.cloned().unwrap_or_default(),
        }
    }
}

impl TextEncoder for OwnedEncoder {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        self.borrowed().encode(text, add_special)
    }

    fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    fn encode_chat(&self, conversation: &Conversation, notes: &mut Notes) -> Result<Encoded, EncodeError> {
        self.borrowed().encode_chat(conversation, notes)
    }

    fn encode_whole_chat(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        self.borrowed().encode_whole_chat(conversation)
    }

    fn encode_prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        self.borrowed().encode_prompt(conversation)
    }

    fn unused(&self, conversation: &Conversation) -> Vec<String> {
        self.borrowed().unused(conversation)
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        self.borrowed().fingerprint()
    }

    fn bos(&self) -> Option<u32> {
        self.borrowed().bos()
    }

    fn eos(&self) -> Option<u32> {
        self.borrowed().eos()
    }

    fn is_end(&self, token: u32) -> bool {
        self.borrowed().is_end(token)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError> {
        self.borrowed().decode(tokens)
    }
}

/// The messages as the chat template gets them.
fn messages(
    conversation: &Conversation,
    template: &ChatTemplate,
    arguments: &TemplateArguments,
) -> Result<Vec<ChatMessage>, EncodeError> {
    let convert = |(i, message): (usize, &crate::data::ConversationMessage)| {
        let text = Value::String(message.content.clone());
        let mut content = message.template_content.clone().unwrap_or_else(|| text.clone());
        let mut extra = message.other.clone();
        if content.is_null() && extra.contains_key("tool_calls") && !template.capabilities(arguments).tool_calls {
            // A call that nobody writes would leave an empty answer to train on.
            if message.content.is_empty() {
                let number = i + 1;
                return Err(format!(
                    "message {number} only has tool_calls, and the chat template does not write them: give one that does \
                     (chat_template_path), or write the call as the message's content"
                ));
            }
            extra.shift_remove("tool_calls");
            content = text;
        }
        let mut message = ChatMessage { role: message.role.clone(), content, extra };
        template.adapt(&mut message, arguments);
        Ok(message)
    };
    conversation.messages.iter().enumerate().map(convert).collect::<Result<_, String>>().map_err(EncodeError::from)
}
