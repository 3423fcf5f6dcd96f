//! Dirty-page tracking for KVM that follows every page through any change of memory slots.
