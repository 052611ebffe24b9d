#!/bin/sh
# Roles that read and write the bucket, and which service account has which, by EKS Pod Identity:
#   k8s/nodes/eks/identities.sh CLUSTER BUCKET
set -eu
export AWS_PAGER=  # or each answer waits in a pager
cluster=$1 bucket=$2
account=$(aws sts get-caller-identity --query Account --output text)
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "pods.eks.amazonaws.com"},
  "Action": ["sts:AssumeRole", "sts:TagSession"]}]}'

# role NAME ACTIONS RESOURCE: may list and read all of the bucket, and ACTIONS on RESOURCE.
role() {
  aws iam create-role --role-name "raymill-$1" --assume-role-policy-document "$trust"
  aws iam wait role-exists --role-name "raymill-$1"  # a new role is not known everywhere at once
  aws iam put-role-policy --role-name "raymill-$1" --policy-name bucket --policy-document "{\"Version\": \"2012-10-17\",
    \"Statement\": [
      {\"Effect\": \"Allow\", \"Action\": [\"s3:ListBucket\", \"s3:ListBucketMultipartUploads\"], \"Resource\": \"arn:aws:s3:::$bucket\"},
      {\"Effect\": \"Allow\", \"Action\": \"s3:GetObject\", \"Resource\": \"arn:aws:s3:::$bucket/*\"},
      {\"Effect\": \"Allow\", \"Action\": [$2], \"Resource\": \"arn:aws:s3:::$bucket/$3\"}]}"
}

write='"s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"'
role writer "$write" '*'
# Who trains writes checkpoints, never what is served of them, nor the log of who ordered it
aws iam put-role-policy --role-name raymill-writer --policy-name not-endpoints --policy-document "{\"Version\": \"2012-10-17\",
  \"Statement\": [{\"Effect\": \"Deny\", \"Action\": [$write], \"Resource\": \"arn:aws:s3:::$bucket/endpoints/*\"}]}"
role server "$write" 'endpoints/*'
role reader '"s3:GetObject"' '*'

for pair in ray-head:writer tokenizer:writer trainer:writer evaluator:reader serving-head:server server:server; do
  aws eks create-pod-identity-association --cluster-name "$cluster" --namespace raymill \
    --service-account "${pair%:*}" --role-arn "arn:aws:iam::$account:role/raymill-${pair#*:}"
done
