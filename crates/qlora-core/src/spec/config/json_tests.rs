use super::*;

fn config(model: &str, options: &str) -> Result<ModelConfig> {
    let text = format!(
        r#"{{"model_type": "{model}", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4,
           "num_attention_heads": 8{options}}}"#
    );
    parse(&text, Path::new("config.json"))
}

#[test]
fn missing_keys_get_the_class_defaults() {
    let llama = config("llama", "").unwrap();
    assert_eq!((llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings), (8, 2, 2048));
    assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert_eq!(llama.sliding_window, [None; 4]);
    assert!(!llama.qkv_bias && !llama.o_bias && !llama.mlp_bias && !llama.qk_norm && !llama.tie_word_embeddings);
    assert_eq!(llama.rms_norm_eps, 1e-6);

    let mistral = config("mistral", "").unwrap();
    assert_eq!((mistral.num_key_value_heads, mistral.max_position_embeddings), (8, 131_072));
    assert_eq!(mistral.sliding_window, [Some(4096); 4]);

    let qwen2 = config("qwen2", r#", "num_key_value_heads": 2"#).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.qk_norm);
    assert_eq!((qwen2.bos_token_id, qwen2.eos_token_ids.len(), qwen2.head_dim), (None, 0, 2));
    assert_eq!(qwen2.sliding_window, [None; 4]);

    let qwen3 = config("qwen3", r#", "num_key_value_heads": null, "num_attention_heads": 32"#).unwrap();
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!((qwen3.num_key_value_heads, qwen3.head_dim), (32, 128));
}

#[test]
fn options_are_read() {
    let llama = config(
        "llama",
        r#", "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true, "head_dim": 4, "num_key_value_heads": 2,
           "rms_norm_eps": 1e-05, "bos_token_id": 3, "eos_token_id": [5, 6, 5], "architectures": ["LlamaForCausalLM"],
           "torch_dtype": "bfloat16", "something_new": {"a": [1]}, "pretraining_tp": 1, "pad_token_id": -1"#,
    )
    .unwrap();
    assert!(llama.qkv_bias && llama.o_bias && llama.mlp_bias && llama.tie_word_embeddings);
    assert_eq!((llama.head_dim, llama.num_key_value_heads, llama.rms_norm_eps), (4, 2, 1e-5));
    assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice()), (Some(3), &[5, 6][..]));
    let ids = config("llama", r#", "bos_token_id": null, "eos_token_id": [-1, 64, 63]"#).unwrap();
    assert_eq!((ids.bos_token_id, ids.eos_token_ids.as_slice()), (None, &[63][..]));
    assert_eq!(config("mistral", r#", "sliding_window": null"#).unwrap().sliding_window, [None; 4]);
    let kv = r#", "num_key_value_heads": 4, "sliding_window": 32"#;
    assert_eq!(config("qwen2", kv).unwrap().sliding_window, [None; 4]);
    let used = format!("{kv}, \"use_sliding_window\": true, \"max_window_layers\": 3");
    assert_eq!(config("qwen2", &used).unwrap().sliding_window, [None, None, None, Some(32)]);
    let types = r#", "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]"#;
    let typed = config("qwen3", &format!("{used}{types}")).unwrap();
    assert_eq!(typed.sliding_window, [Some(32), None, None, Some(32)]);
}

#[test]
fn class_names_of_old_files_and_of_wrappers_are_known() {
    for (model, name) in [
        ("llama", "LLaMAForCausalLM"),
        ("llama", "LlamaModel"),
        ("mistral", "MistralModel"),
        ("qwen2", "Qwen2Model"),
        ("qwen3", "PeftModelForCausalLM"),
        ("llama", "OptimizedModule"),
    ] {
        let options = format!(r#", "num_key_value_heads": 8, "architectures": ["{name}"]"#);
        let named = config(model, &options).unwrap();
        assert_eq!(named, config(model, r#", "num_key_value_heads": 8"#).unwrap(), "{name}");
    }
    for name in ["LlamaRewardModel", "MixtralForCausalLM", "LlamaForTokenClassification", "llama", "Model", ""] {
        assert!(config("llama", &format!(r#", "architectures": ["{name}"]"#)).is_err(), "{name}");
    }
    let old = r#"{"architectures": ["LLaMAForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 4, "num_attention_heads": 8}"#;
    assert_eq!(parse(old, Path::new("x")).unwrap().architecture, Architecture::Llama);
}

#[test]
fn what_is_not_supported_is_named() {
    for (model, options, message) in [
        ("gemma2", "", "model_type \"gemma2\""),
        ("llama", r#", "architectures": ["LlamaForSequenceClassification"]"#, "LlamaForSequenceClassification"),
        ("llama", r#", "architectures": ["MistralForCausalLM"]"#, "different models"),
        ("llama", r#", "hidden_act": "gelu""#, "hidden_act \"gelu\""),
        ("llama", r#", "quantization_config": {"quant_method": "hqq"}"#, "quant_method \"hqq\""),
        ("mistral", r#", "num_local_experts": 8"#, "num_local_experts"),
        ("llama", r#", "final_logit_softcapping": 30.0"#, "final_logit_softcapping"),
        ("llama", r#", "layer_types": ["conv", "conv", "conv", "conv"]"#, "layer type \"conv\""),
        ("mistral", r#", "layer_types": ["full_attention"]"#, "1 entries for 4 layers"),
        (
            "qwen2",
            r#", "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention", "attention", "attention"]"#,
            "no sliding_window in use",
        ),
    ] {
        let error = config(model, options).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("config.json"), "{model}{options}: {error}");
    }
    assert!(parse("{}", Path::new("x")).unwrap_err().to_string().contains("model_type"));
}

#[test]
fn sizes_are_checked() {
    for (options, message) in [
        (r#", "hidden_size": 0"#, "hidden_size is 0"),
        (r#", "num_attention_heads": 0"#, "num_attention_heads (0)"),
        (r#", "num_attention_heads": 3"#, "not a multiple"),
        (r#", "num_key_value_heads": 3"#, "not a multiple of num_key_value_heads"),
        (r#", "num_key_value_heads": 0"#, "num_key_value_heads is 0"),
        (r#", "head_dim": 3"#, "head_dim is 3"),
        (r#", "vocab_size": 18446744073709551615"#, "vocab_size is 18446744073709551615"),
        (r#", "vocab_size": -1"#, "expected a whole number"),
        (r#", "num_hidden_layers": 100000000"#, "num_hidden_layers is 100000000"),
        (r#", "intermediate_size": 1e300"#, "expected a whole number"),
        (r#", "max_position_embeddings": 1000000000000"#, "max_position_embeddings is 1000000000000"),
        (r#", "rms_norm_eps": 2"#, "rms_norm_eps is 2"),
        (
            r#", "hidden_size": 1048576, "num_attention_heads": 1024, "intermediate_size": 4194304, "num_hidden_layers": 4096"#,
            "parameters",
        ),
        (r#", "vocab_size": null"#, "vocab_size is missing"),
    ] {
        let error = config("llama", options).unwrap_err().to_string();
        assert!(error.contains(message), "{options}: {error}");
    }
}
